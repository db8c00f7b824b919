"""Whether anything breaks it: damaged files, recipes and data, processes that end at any moment (``make stress``)."""
