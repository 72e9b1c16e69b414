"""The page of `fairref serve`: a prompt's images by the base and by a fair model, from the same noise."""
