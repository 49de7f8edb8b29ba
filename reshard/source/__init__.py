"""Where bytes come from: files listed, headers read, ranges viewed."""
