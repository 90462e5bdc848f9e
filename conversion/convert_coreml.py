"""Door: `python -m conversion.convert_coreml` opens distill.convert.coreml."""

from distill.convert.coreml import main

if __name__ == "__main__":
    raise SystemExit(main())
