"""Tools for tests of distributed code, for users too: time as a parameter."""
