"""Who answers: endpoints and local models, how they are reached, what they can do, when they are asked."""
