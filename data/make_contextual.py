"""Door: `python -m data.make_contextual` opens distill.evaluate.contextual.make."""

from distill.evaluate.contextual.make import main

if __name__ == "__main__":
    raise SystemExit(main())
