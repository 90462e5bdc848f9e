"""Door: `python -m evaluation.toy_contracts` opens distill.verify.contracts."""

from distill.verify.contracts import main

if __name__ == "__main__":
    raise SystemExit(main())
