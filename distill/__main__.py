"""`python -m distill STAGE` is `distill STAGE`."""

from distill.cli import main

raise SystemExit(main())
