"""Commands on the ML Program executor: info, run, diff, bisect and ranges, for any .mlpackage on any machine."""
