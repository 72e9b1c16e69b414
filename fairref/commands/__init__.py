"""One short file a command of `fairref`: options -> one call; prints."""
