"""Where roles run. Nothing outside ``engine/local`` assumes that roles share a machine, a file system or a clock."""
