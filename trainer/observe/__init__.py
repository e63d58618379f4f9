"""What a run tells about itself, as rows and reports that others compute from."""
