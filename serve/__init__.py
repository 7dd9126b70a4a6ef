"""Ray Serve: the classifier next to the recommender, batches, and the page for dermatologists."""
