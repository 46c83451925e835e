"""What is checked before a study: a site's installation, and what a training needs."""
