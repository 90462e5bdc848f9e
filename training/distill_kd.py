"""Door: `python -m training.distill_kd` opens distill.train.kd."""

from distill.train.kd import main

if __name__ == "__main__":
    raise SystemExit(main())
