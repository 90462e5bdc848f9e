"""Door: `python -m training.quantise` opens distill.train.qat."""

from distill.train.qat import main

if __name__ == "__main__":
    raise SystemExit(main())
