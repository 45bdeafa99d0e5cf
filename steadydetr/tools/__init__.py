"""A trained detector in use; recipes compared and priced."""
