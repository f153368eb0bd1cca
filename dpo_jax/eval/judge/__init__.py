"""Which of two texts is the better one, pair by pair: judges and win rates.

    judging      the verb: pairs → verdicts → files and a table
    options      what config.judge may say
    matched      the pairs: samples of policies, and what they are held against
    judges       who judges, by name: an endpoint, people, a scorer
    question     what a model is asked, and how its answer is read
    asking       many questions at once: retries, kept answers, a budget
    endpoint     a model behind OpenAI's API; nobody else sees the key
    form         a form for people
    rates        rates of verdicts, with lengths.py and agreement.py

Imports no jax, and no client of an API before it is asked for.
"""
