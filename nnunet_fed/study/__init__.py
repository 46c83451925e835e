"""What is studied, by whom: the study, a site, label maps, and the options of the methods."""
