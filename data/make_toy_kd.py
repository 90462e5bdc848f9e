"""Door: `python -m data.make_toy_kd` opens distill.data.toy."""

from distill.data.toy import main

if __name__ == "__main__":
    raise SystemExit(main())
