"""What the tests, the hostile tests and the fuzzer share. Nothing here needs pytest, except for `fenced`."""
