"""The claims of docs/method.md and docs/derivation.md as checks: what `fairref verify` runs."""
