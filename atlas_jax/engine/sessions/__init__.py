"""Sessions: what one holds, in which tier it lies, and how it is stored between requests and between starts."""
