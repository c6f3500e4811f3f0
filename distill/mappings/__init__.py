"""Teacher space → student space, one file each: estimators fitted from a store, then frozen."""
