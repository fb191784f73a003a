"""Which experts stay close: the cache, eviction policies, prefetchers and the replay of a routing trace."""
