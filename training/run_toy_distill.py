"""Door: `python -m training.run_toy_distill` opens distill.train.toy."""

from distill.train.toy import main

if __name__ == "__main__":
    raise SystemExit(main())
