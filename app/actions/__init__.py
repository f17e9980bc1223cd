"""What the page can do, as plain Python: each action calls the library or queues a job that does."""
