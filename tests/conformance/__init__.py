"""Apple's own operator tests, run through the executor: `make conformance`."""
