"""Door: `python -m conversion.make_toy_torch` opens distill.export.toy."""

from distill.export.toy import torch_main as main

if __name__ == "__main__":
    raise SystemExit(main())
