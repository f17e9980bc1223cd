"""What is shown of results side by side: comparisons, what a fusion kept, how exact the arithmetic is."""
