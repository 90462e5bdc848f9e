"""Door: `python -m training.process_supervision` opens distill.train.process."""

from distill.train.process import main

if __name__ == "__main__":
    raise SystemExit(main())
