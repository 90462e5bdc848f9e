"""Door: `python -m infra.version_gate` opens distill.versions."""

from distill.versions import main

if __name__ == "__main__":
    raise SystemExit(main())
