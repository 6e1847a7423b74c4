"""Hydra's launchers with a sweep's manners: every job is awaited, one that fails harms no other,
and the multirun ends with a table of what failed and why. (Hydra looks for plugins here.)"""
