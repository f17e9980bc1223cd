"""The studio: photos to exported file in one web page. `jobs` (queue and worker), `actions` (what the page can do), `ui`."""
