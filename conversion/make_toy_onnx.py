"""Door: `python -m conversion.make_toy_onnx` opens distill.export.toy."""

from distill.export.toy import onnx_main as main

if __name__ == "__main__":
    raise SystemExit(main())
