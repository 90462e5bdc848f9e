"""Door: `python -m training.make_toy_training` opens distill.train.toy."""

from distill.train.toy import make_main as main

if __name__ == "__main__":
    raise SystemExit(main())
