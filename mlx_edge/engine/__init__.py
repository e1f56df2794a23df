"""Many sequences at once: requests that come and go, one thread that owns MLX, memory promised before it is used."""
