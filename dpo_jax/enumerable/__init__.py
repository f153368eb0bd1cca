"""The paper's comparison of methods where nothing has to be estimated.

language   all answers of a small language: r*, E[r], KL, π*, the frontier
programs   many runs of a method in one compiled program
build      the configs of a sweep, as what the programs take
study      all methods, labellings and seeds: tuned, trained, measured, kept
"""
