"""Its place makes pytest put this folder on the path, so that tests of every kind can import `ham_predictions`."""
