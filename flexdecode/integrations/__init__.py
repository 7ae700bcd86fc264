"""flexdecode inside other libraries."""
