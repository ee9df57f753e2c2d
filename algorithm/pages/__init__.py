"""report.html and its content."""
