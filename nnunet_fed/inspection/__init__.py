"""One look at all of a data set before anything of it is used: dataset.json, names, and every file."""
