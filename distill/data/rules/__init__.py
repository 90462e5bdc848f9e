"""The rules of a dataset, and the detectors of what must not be in one."""
