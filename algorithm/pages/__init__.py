"""report.html and what is shown on it."""
