"""Door: `python -m scripts.make_kd_mix_hardened` opens distill.data.mix."""

from distill.data.mix import main

if __name__ == "__main__":
    raise SystemExit(main())
