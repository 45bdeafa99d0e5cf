"""One small pure function per equation, cited by paper and number; docs/equations.md maps each to its test."""
