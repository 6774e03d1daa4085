"""What a run did, line by line, for whoever looks at it: the page, reports, pandas."""
