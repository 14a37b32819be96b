"""Compare runs: tables, plots, a report in HTML and Markdown, and the W&B dashboard."""
