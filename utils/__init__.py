"""What training needs, a room for each question: see "Where things are" in the README."""
