"""Door: `python -m conversion.make_toy_block` opens distill.export.toy."""

from distill.export.toy import block_main as main

if __name__ == "__main__":
    raise SystemExit(main())
