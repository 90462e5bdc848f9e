"""Door: `python -m scripts.validate_kd_data` opens distill.data.validate."""

from distill.data.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
