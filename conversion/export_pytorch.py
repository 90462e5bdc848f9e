"""Door: `python -m conversion.export_pytorch` opens distill.export.pytorch."""

from distill.export.pytorch import main

if __name__ == "__main__":
    raise SystemExit(main())
