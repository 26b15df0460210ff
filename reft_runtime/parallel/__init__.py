"""One model over several processes: ranks that hold a shard each and compute every step together.

Rank 0 leads: it schedules, samples, and holds the registry. The others follow: they are told what
its runner does, and do the same, so that the model's collectives meet.
"""
