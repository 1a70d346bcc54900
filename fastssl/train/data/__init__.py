"""The data sets: where they come from, how they are kept, and random views of them."""
